"""Almost-orthogonal Lipschitz layers (Prach and Lampert, 2022), and certificates, for PyTorch Lightning."""
