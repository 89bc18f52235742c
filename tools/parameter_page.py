"""
Put the table of parameters into docs/reference/parameters.md, between its marks.

    python3 tools/environment.py run python3 tools/parameter_page.py

test/ros/test_reference_pages.py compares the page with the code.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from gps_denied_c7.ros.parameter_table import parameter_table

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'reference' / 'parameters.md'
MARKED = re.compile(r'(<!-- parameters: begin.*?-->\n).*?(\n<!-- parameters: end -->)', re.DOTALL)


def main() -> int:
    """Write the page; returns the exit status."""
    text = PAGE.read_text(encoding='utf-8')
    PAGE.write_text(MARKED.sub(lambda marks: f'{marks[1]}{parameter_table()}{marks[2]}', text), encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
