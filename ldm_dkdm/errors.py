"""The one family of errors that a user can cause and mend."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in a file, a key or an option; the message names it and says what to do."""


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry point: a `UserError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
