"""`python -m ldm_dkdm` is `dkdm`."""

from ldm_dkdm.commands.entry import main

if __name__ == "__main__":
    main()
