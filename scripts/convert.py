"""The same as `dkdm convert`."""

from ldm_dkdm.commands.entry import main

if __name__ == "__main__":
    main("convert")
