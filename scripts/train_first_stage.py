"""The same as `dkdm train-first-stage`."""

from ldm_dkdm.commands.entry import main

if __name__ == "__main__":
    main("train-first-stage")
