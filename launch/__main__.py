"""`python -m launch` is `einkorn`, for a clone that is not installed."""

from launch.cli import main

main()
