"""``python -m flute_quant`` is ``flute-quant``."""

import sys

from flute_quant.cli import main

sys.exit(main())
