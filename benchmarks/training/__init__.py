"""One training of one method, through PML's trainer, tester and hook container."""
