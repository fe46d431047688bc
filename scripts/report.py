"""The same as `dkdm report`."""

from ldm_dkdm.commands.entry import main

if __name__ == "__main__":
    main("report")
