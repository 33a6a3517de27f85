# SPDX-License-Identifier: Apache-2.0
"""Parts of the diffusion transformer and of the process around it: blocks, flow, samplers."""
