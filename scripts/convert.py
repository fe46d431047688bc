"""The same as `dkdm convert`."""

from ldm_dkdm.commands.main import main

if __name__ == "__main__":
    main("convert")
