"""The same as `dkdm evaluate`."""

from ldm_dkdm.commands.main import main

if __name__ == "__main__":
    main("evaluate")
