"""What the GPU suite shares."""
