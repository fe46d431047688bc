"""The same as `dkdm inspect`."""

from ldm_dkdm.commands.entry import main

if __name__ == "__main__":
    main("inspect")
