"""On a GPU the method computes what it computes on the CPU; without a GPU these tests are skipped."""

import pytest
import torch

from hf_dbp.conversion import decorrelated_layers
from hf_dbp.fusing import extract_vit
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining, initialize_mae_
from hf_dbp.training.optimizers import HiddenWithAdamW
from hf_dbp.update import seed_sampling, update_decorrelation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def model_of(mae_config, layers="full"):
    torch.manual_seed(0)
    model = DBPViTMAEForPreTraining(mae_config(decorrelated_layers=layers))
    torch.manual_seed(0)  # creating more layers has drawn more numbers
    initialize_mae_(model)
    return model.train()


def pixels_and_noise(config):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(8, config.num_channels, config.image_size, config.image_size, generator=generator)
    return pixels, torch.rand(8, (config.image_size // config.patch_size) ** 2, generator=generator)


def trained(mae_config, device, optimizer, steps=3):
    """Losses, weights and R after a few steps in float32."""
    model = model_of(mae_config).to(device)
    pixels, noise = (t.to(device) for t in pixels_and_noise(model.config))
    if optimizer == "muon":
        optimizer = HiddenWithAdamW(model, "muon", lr=1e-3)
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(steps):
        seed_sampling(model, seed=0, step=step)
        loss = model(pixels, noise=noise).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_decorrelation(model, eta=1e-2, kappa=0.1)
        losses.append(loss.item())
    return losses, [layer.decorrelation.R.detach().cpu() for _, layer in decorrelated_layers(model)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_are_those_of_the_cpu(mae_config, optimizer):
    losses, matrices = trained(mae_config, "cpu", optimizer)
    gpu_losses, gpu_matrices = trained(mae_config, "cuda", optimizer)
    assert gpu_losses == pytest.approx(losses, rel=5e-3)  # TF32 in the update of R, bfloat16 in Muon
    for R, gpu in zip(matrices, gpu_matrices, strict=True):
        identity = torch.eye(len(R))
        assert (R - identity).norm() > 0
        assert (gpu - R).norm() <= 0.02 * (R - identity).norm()


def test_under_bfloat16_the_first_loss_is_the_plain_one(mae_config):
    losses = []
    for layers in ("none", "full"):
        model = model_of(mae_config, layers).cuda()
        pixels, noise = (t.cuda() for t in pixels_and_noise(model.config))
        with torch.autocast("cuda", torch.bfloat16):
            losses.append(model(pixels, noise=noise).loss.item())
    assert losses[0] == losses[1]


def test_the_fused_encoder_gives_the_same_features(mae_config):
    model = model_of(mae_config).double().cuda()
    with torch.no_grad():
        for _, layer in decorrelated_layers(model):
            layer.decorrelation.R.add_(0.1 * torch.randn_like(layer.decorrelation.R))
    pixels, _ = pixels_and_noise(model.config)
    features = []
    for encoder in (model.eval().vit, extract_vit(model).eval()):
        encoder.config.mask_ratio = 0.0
        with torch.no_grad():
            features.append(encoder(pixels.double().cuda()).last_hidden_state.sum(1).cpu())
    torch.testing.assert_close(features[0], features[1], rtol=1e-10, atol=1e-10)
