test_traps=None
