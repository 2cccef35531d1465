"""mPLUG-Owl and DocOwl of Alibaba."""
