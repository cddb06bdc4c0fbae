"""The exceptions that mean something to the user, as opposed to "the program is wrong"."""


class ConfigError(ValueError):
    """Bad input from the user: a config key, a file or a data row.

    The message is one line that names the key (or file), its value and the fix. Entry points print it as
    ``error: <message>`` without a traceback and exit with code 2.
    """


class UnreachableError(RuntimeError):
    """Processes that did not come, or cannot talk to each other; one line that names the address and who is missing.

    Entry points print it like a ConfigError and exit with code 6.
    """
