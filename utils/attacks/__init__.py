"""Floor 3: FGSM, PGD, Auto-PGD, those of torchattacks, and the suites that are made of them."""
