"""Programs that make images: an autoencoder, a variational one, and an adversarial pair."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from programs_harness import Program, Refused, digit_loaders
from torch import nn
from torch.nn import functional as F


class AutoEncoder(pl.LightningModule):
    """``forward`` embeds; only the steps run the decoder, which has BatchNorm too."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 6))
        self.decoder = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 64))

    def forward(self, x):
        return self.encoder(x)

    def _reconstruct(self, batch):
        x, _ = batch
        x = x.view(x.size(0), -1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def training_step(self, batch, batch_idx):
        loss = self._reconstruct(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._reconstruct(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class VAE(pl.LightningModule):
    """Random codes in each step, a weight of the prior that grows over epochs, and samples drawn at an epoch's end."""

    def __init__(self, latent=4):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LeakyReLU(), nn.Dropout(0.1))
        self.mu, self.log_var = nn.Linear(32, latent), nn.Linear(32, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, 32), nn.LeakyReLU(), nn.Linear(32, 64), nn.Unflatten(1, (1, 8, 8))
        )
        self.register_buffer("fixed", torch.randn(4, latent, generator=torch.Generator().manual_seed(5)))
        self.drawn = []

    def forward(self, x):
        hidden = self.encoder(x)
        mu, log_var = self.mu(hidden), self.log_var(hidden)
        z = torch.distributions.Normal(mu, (0.5 * log_var).exp()).rsample()
        return self.decoder(z), mu, log_var

    def _losses(self, batch):
        x, _ = batch
        logits, mu, log_var = self(x)
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(dim=1).mean()
        return reconstruction, kl

    def training_step(self, batch, batch_idx):
        reconstruction, kl = self._losses(batch)
        loss = reconstruction + min(1.0, 0.3 * (self.current_epoch + 1)) * kl
        self.log_dict({"reconstruction": reconstruction, "kl": kl, "elbo": -loss})
        return {"loss": loss, "kl": kl.detach()}

    def validation_step(self, batch, batch_idx):
        reconstruction, kl = self._losses(batch)
        self.log("val_loss", reconstruction + kl, prog_bar=True)

    def on_validation_epoch_end(self):
        self.drawn.append(torch.sigmoid(self.decoder(self.fixed)).mean().item())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


class Generator(nn.Module):
    def __init__(self, latent=6):
        super().__init__()
        self.net = nn.Sequential(
            nn.ConvTranspose2d(latent, 12, 4, 1, 0, bias=False), nn.BatchNorm2d(12), nn.ReLU(True),
            nn.ConvTranspose2d(12, 1, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z):
        return self.net(z)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(8, 1, 4, 1, 0, bias=False),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x).view(-1)


class DCGAN(pl.LightningModule):
    """Manual optimization; the images are drawn once and serve both players, the discriminator's step first."""

    def __init__(self, latent=6):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator, self.discriminator = Generator(latent), Discriminator()
        self.generated = None

    def forward(self, z):
        return self.generator(z)

    def noise(self, rows):
        return torch.randn(rows, self.hparams.latent, 1, 1, device=self.device)

    def discriminator_loss(self, real, fake):
        right, wrong = self.discriminator(real), self.discriminator(fake.detach())
        true = F.binary_cross_entropy_with_logits(right, torch.ones_like(right))
        return (true + F.binary_cross_entropy_with_logits(wrong, torch.zeros_like(wrong))) / 2

    def generator_loss(self, fake):
        scores = self.discriminator(fake)
        return F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores))

    def training_step(self, batch, batch_idx):
        real = 2 * batch[0] - 1
        of_generator, of_discriminator = self.optimizers()
        self.generated = self(self.noise(len(real)))

        self.toggle_optimizer(of_discriminator)
        loss = self.discriminator_loss(real, self.generated)
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()
        self.untoggle_optimizer(of_discriminator)

        self.toggle_optimizer(of_generator)
        other = self.generator_loss(self.generated)
        of_generator.zero_grad()
        self.manual_backward(other)
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        self.log_dict({"d_loss": loss, "g_loss": other}, prog_bar=True)

    def configure_optimizers(self):
        options = {"lr": 2e-3, "betas": (0.5, 0.999)}
        return [
            torch.optim.Adam(self.generator.parameters(), **options),
            torch.optim.Adam(self.discriminator.parameters(), **options),
        ]


def adversarial_loss(module, batch, optimizer):
    """The loss of the player whose optimizer steps, of images drawn as the step drew them."""
    fake = module(module.noise(len(batch[0])))
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if id(next(module.discriminator.parameters())) in ours:
        return module.discriminator_loss(2 * batch[0] - 1, fake)
    return module.generator_loss(fake)


PROGRAMS = {
    "autoencoder": Program(
        AutoEncoder,
        groups=lambda batch: batch[1] % 2,
        plugins=dict.fromkeys(("AOL", "LIMES", "BiasAudit"), Refused("forward(inputs) failed", "Plugins(head=...)")),
    ),
    "VAE": Program(
        VAE,
        draws=True,
        groups=lambda batch: batch[1] % 2,
        plugins={
            "AOL": Refused("cannot be traced", "part"),
            "LIMES": Refused("come from decoder.2, log_var, mu", "Plugins(head=...)"),
            "BiasAudit": Refused("come from decoder.2, log_var, mu", "Plugins(head=...)"),
        },
    ),
    "DCGAN": Program(
        DCGAN,
        lambda: (digit_loaders()[0], None),
        loss_fn=adversarial_loss,
        plugins={
            "AOL": Refused("cannot take an input of shape (1, 8, 8)"),
            "LIMES": Refused("forward(inputs) failed", "Plugins(head=...)"),
            "BiasAudit": None,
        },
    ),
}
