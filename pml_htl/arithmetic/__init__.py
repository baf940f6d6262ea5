"""The arithmetic of the loss: pure functions on matrices, which know neither labels of a data set nor a tree."""
