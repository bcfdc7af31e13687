"""``python -m programs.smollm2`` converts the model when it has to, and prints its folder."""

from programs import smollm2

if __name__ == "__main__":
    print(smollm2.folder())
