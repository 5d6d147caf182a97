"""`python -m megadual.vision.eval`"""

from .evaluate import main

if __name__ == "__main__":
    main()
