plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "edgegen.sample"
    compileSdk = 35

    defaultConfig {
        applicationId = "edgegen.sample"
        minSdk = 26
        targetSdk = 35
        versionCode = 1
        versionName = "1.0"
    }

    // the model is mapped into memory, which a compressed asset cannot be
    androidResources { noCompress += "tflite" }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }

    kotlinOptions { jvmTarget = "17" }
}

dependencies {
    implementation("com.google.ai.edge.litert:litert:1.4.0")
    implementation("com.google.ai.edge.litert:litert-gpu:1.4.0")
    implementation("com.google.ai.edge.litert:litert-gpu-api:1.4.0")
}

// -PedgegenModel=FILE says where the model lies; it goes into the app as @MODEL_FILE@
val model = tasks.register<Copy>("copyModel") {
    from(providers.gradleProperty("edgegenModel").orElse("$rootDir/../@MODEL_FILE@"))
    into("src/main/assets")
    rename { "@MODEL_FILE@" }
}

tasks.named("preBuild") { dependsOn(model) }
