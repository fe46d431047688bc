"""The same as `dkdm train`."""

from ldm_dkdm.commands.entry import main

if __name__ == "__main__":
    main("train")
