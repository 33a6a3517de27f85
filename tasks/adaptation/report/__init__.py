# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for people: predictions, what experts contribute, what adaptation changed."""
