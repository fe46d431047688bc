"""The same as `dkdm sample`."""

from ldm_dkdm.commands.entry import main

if __name__ == "__main__":
    main("sample")
