"""One file an op: its definition in plain PyTorch (`reference`), its autograd Functions, its public function."""
