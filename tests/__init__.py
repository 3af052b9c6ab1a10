"""The tests of tcc; a package so that tests share their tiny models."""
