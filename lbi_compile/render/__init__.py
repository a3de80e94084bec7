"""Plans and reports as text for people, on terminals and in files."""

from __future__ import annotations
