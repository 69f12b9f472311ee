"""The checks, one function each; the name says what must hold, the text of an error how it did not."""
