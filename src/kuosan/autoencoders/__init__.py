"""Ladders whose q is learned: the VAE, the two-layer VAE and the hierarchical VAE of T layers."""

from collections.abc import Callable

from kuosan.autoencoders.convolution import ConvolutionalAutoencoder, ImageAutoencoder
from kuosan.autoencoders.heads import DECODERS, POSTERIORS
from kuosan.autoencoders.hierarchy import Autoencoder

#: The autoencoders that recipes know by name.
AUTOENCODERS: dict[str, Callable] = {"vae": Autoencoder, "convolutional": ConvolutionalAutoencoder}

__all__ = ["AUTOENCODERS", "DECODERS", "POSTERIORS", "Autoencoder", "ConvolutionalAutoencoder", "ImageAutoencoder"]
