"""The same as `dkdm inspect`."""

from ldm_dkdm.commands.main import main

if __name__ == "__main__":
    main("inspect")
