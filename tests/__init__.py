"""The tests, in a folder for each part of the project; `helpers` is what several of them use."""
