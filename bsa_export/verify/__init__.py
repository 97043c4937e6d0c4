"""Proof that a converted folder is right: checks that return values. The file and layout checks need no torch."""

from bsa_export.verify.checks import FAILED, PASSED, SKIPPED, Check
from bsa_export.verify.file import check_file
from bsa_export.verify.layout import check_layout

__all__ = ["FAILED", "PASSED", "SKIPPED", "Check", "check_file", "check_layout"]
