"""The commands: one thin file each over a library room. A file here holds the help and the arguments; the room is imported inside
the command's body, so that `--help` answers at once.
"""
