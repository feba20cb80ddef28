"""peft_fx.kernels: custom operators.

The files lie in the repository's kernels/ folder, which has no __init__.py so that Hugging Face's installed `kernels`
package stays importable from the repository root (setup.cfg tells the whole story). A module with a `__path__` is a
package: this one takes its sub-modules from that folder in a checkout, and from peft_fx/kernels/ in a wheel.
"""

from pathlib import Path

_package = Path(__file__).resolve().parent
_is_checkout = (_package.parent / "setup.cfg").is_file()

__path__ = [str((_package.parent if _is_checkout else _package) / "kernels")]

# The first import of torch registers the operators (operators.py): before one of their files is half imported, not within.
import torch  # noqa: E402, F401
