"""python -m workbench.teach NOTEBOOKS OUT: copies of notebooks without solutions."""

from workbench.teach.copies import main

if __name__ == "__main__":
    main()
