"""What may be asked for, how it is read, and how a cell is named by it."""
