"""The same as `dkdm train`."""

from ldm_dkdm.commands.main import main

if __name__ == "__main__":
    main("train")
