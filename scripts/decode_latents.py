"""The same as `dkdm decode`."""

from ldm_dkdm.commands.main import main

if __name__ == "__main__":
    main("decode")
