"""`python -m softprompt.cli`."""

import sys

from softprompt.cli import main

sys.exit(main())
