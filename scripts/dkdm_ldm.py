"""The same as `dkdm distill`."""

from ldm_dkdm.commands.entry import main

if __name__ == "__main__":
    main("distill")
