"""`python -m tcc`: the command line, for launchers such as torchrun."""

from tcc.cli import main

if __name__ == "__main__":
    main()
