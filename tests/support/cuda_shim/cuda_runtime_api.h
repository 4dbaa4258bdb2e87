#pragma once
#include "cuda_runtime.h"
#define CUDART_VERSION 0
