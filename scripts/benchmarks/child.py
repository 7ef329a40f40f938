"""One measurement in a process of its own: `python -m … MODULE FUNCTION ARGUMENTS`."""

import importlib
import json
import sys


def main() -> None:
    _, module, function, arguments = sys.argv
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
