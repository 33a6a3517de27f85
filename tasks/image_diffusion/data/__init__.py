# SPDX-License-Identifier: Apache-2.0
"""Labelled images and latents: generated, out of packages, read from files, batched."""
