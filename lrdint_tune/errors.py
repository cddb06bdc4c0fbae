"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class ConfigError(ValueError):
    """Bad input from the user: a config key, a file or a data row.

    The message is one line that names the key (or file), its value and the fix. Entry points print it as
    ``error: <message>`` without a traceback and exit with code 2.
    """
