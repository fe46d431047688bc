"""The same as `dkdm evaluate`."""

from ldm_dkdm.commands.entry import main

if __name__ == "__main__":
    main("evaluate")
