"""What the commands of `moe-ext` share: an error that is one sentence and an exit code, and the check for optional packages."""

from __future__ import annotations

from importlib.util import find_spec


class CommandError(Exception):
    """Ends a command: printed as one sentence, without a traceback. Exit code 2: nothing was begun; 1: the answer is no."""

    def __init__(self, sentence: str, exit_code: int = 2) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def require(*packages: str) -> None:
    """Raises CommandError, with the command that installs them, when one of `packages` cannot be imported."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        verb = "is" if len(missing) == 1 else "are"
        raise CommandError(f"needs {names}, which {verb} not installed; install with: pip install {' '.join(missing)}")
