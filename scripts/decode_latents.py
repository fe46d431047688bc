"""The same as `dkdm decode`."""

from ldm_dkdm.commands.entry import main

if __name__ == "__main__":
    main("decode")
