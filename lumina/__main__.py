import sys

try:
    from lumina.cli import main

    status = main()
except KeyboardInterrupt:
    status = 130
sys.exit(status)
