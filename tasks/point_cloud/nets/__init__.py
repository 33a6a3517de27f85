# SPDX-License-Identifier: Apache-2.0
"""Parts of the network: attention, sparse convolution, curves, the text head."""
